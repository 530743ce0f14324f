"""The tensor operations a model is made of, behind one table with several implementations."""
