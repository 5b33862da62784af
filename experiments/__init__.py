"""The paper's claim at small scale: arms trained on equal FLOPs and compared; results as JSON, figures and tables from them.

Apart from benchmarks/, which measure how fast the code is: here it is what a model has learnt from the same work.
"""
