"""Training data, from records to batches.

In order: ``records`` reads the samples of the recipe's sources. ``split`` skips those that can't be trained on, and
``held_out`` chooses images for validation. ``plan`` assigns samples to optimizer steps. ``sample_set`` encodes a
sample: ``image_order`` places its images, the template renders it, ``encode`` and ``text_tokens`` tokenize it and
compute labels. ``micro_batches`` divides a global batch, using ``packing`` for packed sequences, and ``batches`` adds
features. ``token_info`` lists the tokens of a sample for inspection.
"""
