"""filter: what is measured of each sample, and which samples a source keeps."""
