"""What any run needs: config, checkpoints, data, latents, EMA, guidance, images, logs. Knows no model and no process."""
