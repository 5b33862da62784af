"""FID, sFID, Inception Score, precision, recall and KID as the published tables define them."""
