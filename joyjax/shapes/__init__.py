"""The world of the demo model: pictures of coloured shapes, edits of them in plain words, and a judge of results."""
