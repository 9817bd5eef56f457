"""Bridges to other interpretability packages; importing one of them needs only that package."""
