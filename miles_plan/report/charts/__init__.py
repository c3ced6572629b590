"""Charts drawn as SVG by hand: no library, no request, small files."""
