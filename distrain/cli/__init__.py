"""Commands; the only package that joins configuration, job and launcher."""
