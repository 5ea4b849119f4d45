"""Choose which fusion groups get the pattern: what each costs, what each saves, and the best under
a constraint."""
