"""``quire report RUN``: one HTML file that shows what the latents of a sparse dictionary fire on."""
