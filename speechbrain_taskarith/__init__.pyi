from .fragments import fragment as fragment

__version__: str
