"""What a result says about itself to people: a page with pictures, made of what was measured."""
