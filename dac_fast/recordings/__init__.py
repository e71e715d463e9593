"""Recordings of any length to codes and back, in constant memory."""
