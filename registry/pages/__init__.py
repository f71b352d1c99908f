"""What every page is made with: layout, colors, pictures, rendered cards."""
