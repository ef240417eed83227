"""What several techniques use; none of these is a technique itself."""
