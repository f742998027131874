"""Timing, its statistics, and worker processes to time and try foreign code in; imports nothing by itself."""
