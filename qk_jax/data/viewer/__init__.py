"""Looks at training examples: which are shown, and the page that shows them."""
