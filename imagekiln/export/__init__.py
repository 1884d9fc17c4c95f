"""Writers of other formats, each of which loads back what it wrote."""
