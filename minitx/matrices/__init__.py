"""Ways to keep and to multiply a matrix, shared by several techniques; none is one itself."""
