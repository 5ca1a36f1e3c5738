"""Plots and the page that shows them."""
