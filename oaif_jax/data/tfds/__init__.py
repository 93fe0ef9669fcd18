"""The papers' data sets for TensorFlow Datasets: prepared as array_record and read, both without TensorFlow."""
