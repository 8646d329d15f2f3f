"""Other formats of annotations to COCO instances files, and back; one file a format."""
