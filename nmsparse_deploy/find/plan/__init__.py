"""Which fusion groups get the pattern: what each costs, what each saves, and the best choice under a constraint."""
