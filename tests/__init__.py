from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The checkout: recipes, results and scripts lie below it."""
