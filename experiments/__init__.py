"""The paper's claim at small scale: arms trained on equal FLOPs and compared; results as JSON, figures and tables from them."""
