"""Small networks on small pictures: what their three trainers share."""
