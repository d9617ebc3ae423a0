"""A tree of cases -> rows, and a row -> its files opened together."""
