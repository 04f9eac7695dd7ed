"""Curvature of a loss: Hessian eigenpairs, Hessian-vector products, spectral densities."""

from ncjax.curvature.hessian import hvp as hvp
from ncjax.curvature.landscape import HessianEig as HessianEig
from ncjax.curvature.landscape import SpectralDensity as SpectralDensity
from ncjax.curvature.landscape import hessian_eig as hessian_eig
from ncjax.curvature.landscape import spectral_density as spectral_density
