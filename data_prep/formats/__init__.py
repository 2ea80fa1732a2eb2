"""Containers that images lie in: folders, tars and zips, LMDBs, pickled and packed batches. Not for what they mean."""
