"""The mathematics of diffusion and flow models, without networks: paths, noise densities, samplers, guidance."""
