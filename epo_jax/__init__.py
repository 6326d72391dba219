"""EPO: entropy-regularized policy optimization for multi-turn language-model agents (arXiv 2509.22576)."""
