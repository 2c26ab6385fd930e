"""Datasets: schema, local store, readers of published formats, generators."""
