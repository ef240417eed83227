"""Ways to keep and to multiply a matrix that several techniques share; none is a technique itself."""
