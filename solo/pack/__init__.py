"""pack: which documents share a training sequence, and in which order the sequences are trained."""
