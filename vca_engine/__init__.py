"""What any run needs, whatever it is a run of: so far `vca_engine.images`, from image files to pixels and back."""
