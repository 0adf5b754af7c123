"""Registration and availability of the sites, and the exchanges with them."""
