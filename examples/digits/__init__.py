"""The demo: scikit-learn's digits, made hard enough that compression has something to lose."""
