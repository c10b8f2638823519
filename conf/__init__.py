"""The configuration groups; a package, so that `pkg://distrain.conf` finds them."""
