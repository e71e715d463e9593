"""A server under load: what is asked, of whom, and what is measured."""
