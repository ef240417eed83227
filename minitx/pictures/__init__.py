"""Pictures of what a model does and what a technique saves: for the terminal, as SVG, as HTML."""
