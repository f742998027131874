"""Deliberately faulty transforms and faithful ones, on small models of many kinds: what can the validator see?"""
