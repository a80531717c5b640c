"""What every other room uses: masks, boxes, images, metrics, devices, threads, files."""
