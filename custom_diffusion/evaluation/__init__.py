"""How good a learned concept is: text alignment, image alignment and KID, as the paper measures them."""
