"""What runs inside the containers, one file for each thing a container does; it never imports the operator's side."""
