"""report: a recipe's closing account, and the pages of all parts."""
