"""Commands; the only package that combines configuration, job and launcher."""
