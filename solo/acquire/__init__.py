"""acquire: a source as it is published, to raw tars of samples and a row for every input."""
