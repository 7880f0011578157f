"""The experiment that freezeplan ships: VGG16 to PASCAL VOC 2012 in four arms (``freezeplan run voc_vgg16``)."""
