"""One HTML page of a run and its predictions, which needs nothing but a browser."""
