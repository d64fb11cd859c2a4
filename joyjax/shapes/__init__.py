"""The demo model's domain: pictures of coloured shapes, edits of them in plain words, and a judge of results."""
