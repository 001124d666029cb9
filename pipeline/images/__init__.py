"""Files to pixels: the list of images and labels, decoding, the crop and the views, and photographs for the demo."""
