"""Images, audio and video: from files and arrays to what the towers read."""
