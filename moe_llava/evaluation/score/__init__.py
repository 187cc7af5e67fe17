"""Score answers: benchmark definitions, statistics, tables."""
